_base_ = ['../_base_/segformer_b0_ccp_mini.py', './crls.py']
protocol = '10-5'
expansion_width = 1024
