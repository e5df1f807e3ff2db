"""Make presets: text to second moments of K and V, moments to bases, bases to a folder."""
