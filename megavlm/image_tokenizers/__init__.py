"""Images to codes and back: pixels, pretrained VQ models, compressed codes; and how one's own are trained."""
