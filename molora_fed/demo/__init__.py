"""A whole cooperative on one machine."""
