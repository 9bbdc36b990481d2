"""Adapters for other libraries, one a module; each imports its library, nothing else imports them."""
