"""OpenVINO on CPUs: networks converted once, kept in the cache folder. Which networks, their families know."""
