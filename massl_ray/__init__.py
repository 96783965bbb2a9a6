"""massl-ray: pretrain vision backbones on your own unlabelled images with MaSSL, on machines that come and go."""

__version__ = "0.1.0"
