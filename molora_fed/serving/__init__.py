"""Serving: HTTP connections and addresses, texts in one running batch, an API as OpenAI's."""
