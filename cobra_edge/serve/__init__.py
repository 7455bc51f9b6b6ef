"""An OpenAI-compatible server over one session, and the page that talks to it."""
