"""The command line of Z-Image: `zimage train | generate | convert | inspect`. Installs as `zimage_cli`."""
