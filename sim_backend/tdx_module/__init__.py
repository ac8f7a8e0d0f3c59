"""The Intel TDX module, release 1.5: SEAMCALLs, TDCALLs and VM exits."""
