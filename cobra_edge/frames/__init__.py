"""Where frames come from: cameras, streams, videos, snapshot URLs and directories of images."""
