"""Fine-tuning a pretrained checkpoint: retrieval, captioning, visual question answering, classification."""
