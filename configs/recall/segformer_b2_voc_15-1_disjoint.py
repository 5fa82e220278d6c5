_base_ = ['../_base_/segformer_b2_voc.py', './recall.py']
protocol = '15-1'
setting = 'disjoint'
# A folder of images: --cfg-options outside_root=FOLDER
outside_root = None
outside_dataset = dict(type='ImageFolder', root='$outside_root')
