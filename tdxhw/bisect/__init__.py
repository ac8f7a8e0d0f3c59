"""Find the commit that broke a kernel: `git bisect run` over `tdxhw validate`."""
