"""Where each sequence's archived part ends, found on the device."""
