"""What a model is trained on: conversations about images, and the documents that are drawn for it."""
