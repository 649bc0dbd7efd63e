"""The web demo. Nothing else imports it."""
