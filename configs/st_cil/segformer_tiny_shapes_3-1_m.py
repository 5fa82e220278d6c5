_base_ = ['../_base_/segformer_tiny_shapes.py', './st_cil.py']
protocol = '3-1'
memory = 18
# Drawn like the training images, from another seed; their masks are never read.
outside_dataset = dict(
    type='ShapesDataset',
    data_root='$data_root',
    split='train',
    num_classes='$num_shapes',
    num_images='$train_images',
    image_size='$image_size',
    seed=1)
