"""What images may ask for."""

# Pillow's names of what a server takes: formats that it decodes in C, and not before their size is known
SERVED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
