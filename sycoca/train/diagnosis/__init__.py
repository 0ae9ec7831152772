"""What a run says about itself while it trains: who stands still, what is not finite, how hard each objective pulls."""
