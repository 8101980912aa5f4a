"""The model: configurations, decoder, vision tower, projector, and the packed core that joins them."""
