"""What `make site-check` measures inside its pods, one measurement a command: `python -m trainer.sitecheck --help`.

tools/site starts the pods, calls these commands in them and judges what they print (one JSON document each). It mounts this folder over
the image's own, so that both sides are of one checkout whatever image an environment has pinned.
"""
