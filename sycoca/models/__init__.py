"""The networks: encoders, decoders, masking, and the rules that initialise them."""
