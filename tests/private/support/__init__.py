"""What the tests of private memory share; no test is in here."""
