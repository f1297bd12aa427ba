"""What a batch is: paired loader, unlabeled data set, weak and strong views, seeding."""
