"""What all pages share: the self-contained page and its figures; nothing here reads files or measures."""
