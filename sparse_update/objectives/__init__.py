"""What a step minimises: how a batch is scored, what gradient comes of it, and what the model is judged by."""
