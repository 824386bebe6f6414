"""What contributors find out together about texts that none of them shows."""
