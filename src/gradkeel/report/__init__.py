"""Results as figures and pages; nothing here reads files or measures."""
