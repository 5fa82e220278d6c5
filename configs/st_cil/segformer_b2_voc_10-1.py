_base_ = ['../_base_/segformer_b2_voc.py', './st_cil.py']
protocol = '10-1'
# A folder of images: --cfg-options outside_root=FOLDER
outside_root = None
outside_dataset = dict(type='ImageFolder', root='$outside_root')
