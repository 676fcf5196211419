"""Many runs from one grid file: its cells, how they are run, and the tables made of them."""
