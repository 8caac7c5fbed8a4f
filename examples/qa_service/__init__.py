"""A question-and-answer service on the proxy (dissertation, section 4.5.1): see README.md."""
