"""What only the embedded model needs: its scenes and captions, its architecture, its classifier and its scores."""
