"""Data on disk: pictures, folders of pictures, tokens. Also the digits of the quickstart, and augmentation."""
