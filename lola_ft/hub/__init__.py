"""Publishing a run, an adapter or a merged model on the Hugging Face Hub."""
