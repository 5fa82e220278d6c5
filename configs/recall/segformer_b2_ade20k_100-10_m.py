_base_ = ['../_base_/segformer_b2_ade20k.py', './recall.py']
protocol = '100-10'
memory = 300
# A folder of images: --cfg-options outside_root=FOLDER
outside_root = None
outside_dataset = dict(type='ImageFolder', root='$outside_root')
