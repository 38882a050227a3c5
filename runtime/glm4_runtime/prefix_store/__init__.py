"""A prefix cache on disk: keys and values of prompts, for later processes and other sessions of the same bundle."""
