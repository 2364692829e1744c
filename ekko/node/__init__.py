"""What a running node consists of, beside the protocol and the store. `ekko.daemon` puts it together and sees to its life."""
