:M
empty2 
aConstR
valueb	

@2"
out	NetOutput*a:0Š

input0