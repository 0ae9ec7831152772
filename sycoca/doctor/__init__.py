"""A check-up of an experiment before the hours are spent: data, tokenizer, masks, launch, memory, time, learning."""
