"""Images with one class each: found, checked, indexed, and decoded when they are needed."""
