"""The study: which batch size and how many workers pay, and pictures of what training does."""
