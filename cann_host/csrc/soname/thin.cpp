// Deliberately empty. Each of CANN's libraries is a thin one with the right SONAME that depends on
// libcann_host.so, where all the code is; dlsym on a thin library's handle finds it there.
