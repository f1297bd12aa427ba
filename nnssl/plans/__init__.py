"""Planning from labeled cases, preprocessing of unlabeled ones, splits and the manifest."""
