"""python -m zimage_mlx.tiny --output DIR: makes the built-in model anew."""

from .recipe import main

if __name__ == "__main__":
    main()
