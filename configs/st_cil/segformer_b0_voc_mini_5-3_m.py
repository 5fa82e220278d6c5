_base_ = ['../_base_/segformer_b0_voc_mini.py', './st_cil.py']
protocol = '5-3'
memory = 40
# A folder of images: --cfg-options outside_root=FOLDER
outside_root = None
outside_dataset = dict(type='ImageFolder', root='$outside_root')
