"""Where answers come from: one interface, two engines (in the process, or an OpenAI-compatible endpoint)."""
