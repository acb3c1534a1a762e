"""Images to codes and back: pixels, pretrained VQ models, compressed codes; and training of one's own."""
