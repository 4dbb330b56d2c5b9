"""The two tasks that come with the package: each has its data, and its rewards or its evaluation."""
