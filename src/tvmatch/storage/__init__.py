"""Files that appear whole or not at all, locks on folders, downloads from the Hugging Face Hub."""
