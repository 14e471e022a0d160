"""The page: a conversation with the model, made with Gradio."""
