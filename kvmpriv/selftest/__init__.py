"""The suite's runner and its reports; the tests themselves are tests/private."""
