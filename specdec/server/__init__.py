"""An OpenAI-compatible server on a pool; needs the extra ``serve``."""
